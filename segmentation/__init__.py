"""Pixels into shapes: patch classifier, refinement, polygons."""
