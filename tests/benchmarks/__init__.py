"""Tests of what benchmarks compute with: numbers that people trust."""
