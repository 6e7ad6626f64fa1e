"""What every command of this project has in common; it knows none of them."""
