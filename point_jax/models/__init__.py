"""Networks: PTv3 encoder and decoder, and the heads of self-distillation."""
