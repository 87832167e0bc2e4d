"""Thinking while generating: thoughts made from the text's key-value cache, used for one token and dropped."""
