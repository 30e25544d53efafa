"""Protected text encoders in other programs' formats, and the model card."""
