"""AutoFocusFormer and other models built from the public ops."""
