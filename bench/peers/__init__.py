"""What others would write for the same pictures: programs to compare with. They import nothing of the package."""
