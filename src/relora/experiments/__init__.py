"""`relora compare`: methods side by side on the same model and data, each with its best learning rate.

methods               overrides of the configuration that the name of a pretraining method stands for
rates                 learning rates as the command line gives them
search                which learning rates to try, for how long, and which of them is the best
pretraining_runs      one pretraining run: its folder, its process, its outcome; none is made twice
compare_pretraining   the comparison of pretraining methods, from the four above
compare_finetuning    the comparison of fine-tuning methods, on one base model and one set of instructions
results               outcomes of runs and of comparisons, as data
tables                the same for people and spreadsheets: rows, Markdown, CSV, page
"""
