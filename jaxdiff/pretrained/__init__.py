"""Weights of the field, read without their framework and without running code."""
