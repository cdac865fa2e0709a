"""Plans: what a run will do, what it will take, whether it fits, and what this machine offers it.

timetable      phases, restarts, tokens and trainable parameters of a run (`relora pretrain --dry-run`)
plan           memory and time of every phase (`relora plan`), from the modules below
phase_cost     memory and time of one phase
step           memory and time of one training step, which is gone through with tensors that have no memory
ledger         count of the bytes and seconds of such a step
moments        tensors that the optimizer keeps for a parameter
probe          peak memory and time of real steps in a process of their own
variants       settings that a plan may change
alternatives   memory and time of the same run with other settings
fit            search for the fastest configuration within a memory limit
sizes          byte sizes as people write them
doctor         findings about this machine (`relora doctor`)
"""
