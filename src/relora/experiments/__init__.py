"""`relora compare`: methods side by side at equal tokens, each run in a process of its own.

methods       what a name stands for: overrides of the configuration
tuning        which learning rates to try, and for how long
runs          a folder for each run, several side by side, none twice
pretraining   the three together
results       what came out, and what follows from it
table         the table, in print, Markdown and CSV
finetuning    the same question for fine-tuning methods, on one base and one instruction set
"""
