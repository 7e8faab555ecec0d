"""The passes: one file each; :data:`ALL` is their explicit order."""
