"""What all folders of the project share; it imports none of them."""
