"""Analyses: student and teachers side by side. They read runs and models, and never train."""
