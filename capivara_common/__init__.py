"""Code that all packages of the project share. It imports no other package of the project."""
