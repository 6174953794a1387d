"""What a recipe costs, said before it is paid."""
