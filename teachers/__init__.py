"""Teachers: frozen classifiers found by name, kept in a library, and combined into one soft target."""
