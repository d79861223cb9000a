"""What others would write for the same pictures: the programs that the benchmarks compare with. They import nothing of ours."""
