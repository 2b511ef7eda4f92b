"""Tokenizers (character, byte, BPE) and their files."""
