"""Initialisations that are shown data first: the model runs on it, and adapters begin from that."""
