"""The library behind train.py, sample.py and the other programs; see docs/design.md for its layers."""
