"""Adapter networks: one module per kind, each with the public ``create_network`` protocol."""
