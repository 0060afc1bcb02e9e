"""Networks: PTv3 encoder and decoder, heads of self-distillation, image encoders."""
