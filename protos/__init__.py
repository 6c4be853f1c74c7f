"""The wire contract of the tuning service: protocol buffers and the code generated from them."""
