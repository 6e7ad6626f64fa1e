"""Code that all packages of the project share, for example for files, images, command lines and caches.

This package imports no other package of the project.
"""
