"""Measures how far a map can be trusted: faithfulness, localisation, sanity, and the reports made of them."""
