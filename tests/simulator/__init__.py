"""The commit protocol under a seeded scheduler: the real code, a store that fails, and a clock that is not one."""
