"""Raw data sets -> scene folders. Runs offline on numpy, scipy and pillow; needs no JAX."""
