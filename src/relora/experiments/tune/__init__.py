"""`relora tune`: search of the settings of LoRA and ReLoRA by many runs, most of which are given up early.

    space  ->  a draw of settings  ->  a run folder: 25%  ->  50%  ->  100% of the run  ->  best.yaml, table, page

spaces       which settings may take which values; the built-in spaces are YAML files beside it
draws        one draw: optuna's suggestions, or the configuration's own values, as overrides of the configuration
rungs        which trial goes on: successive halving over the held-out losses at each rung
storage      where optuna keeps a study: SQLite, a database server, or a journal file
study        the trials of a study, and what it was made for
limits       what a trial may take: memory, size of the adapter, time
trials       a part of one trial in a process of its own
search       the search itself: what is to be done next, and what its end means
importance   how much each setting matters, by fANOVA, with its uncertainty
advice       the same in words
output       best.yaml, tune.json, .md, .csv and the page
"""
