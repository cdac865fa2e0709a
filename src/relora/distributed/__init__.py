"""Several processes that train one model: their group, sums over them, and the agreement between them.

launch      the launcher's variables, and a store for this attempt of the launch alone
heart       which processes are alive, and the name of one that is not
group       the group of processes of a run; with one process every method does nothing
reduce      the gradients of a step, summed over all processes
tree        the same in one fixed order, so that every number of processes gives the same bits
agree       the same configuration, data and weights on all processes
pace        processes that are slower than the others
"""
