"""A law of loss over sizes, fitted to a sweep."""
