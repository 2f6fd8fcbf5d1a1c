"""Attacks on trained models: what is attacked, how, and what comes out."""
