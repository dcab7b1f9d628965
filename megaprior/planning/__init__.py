"""What a run will need, before it is started: `megaprior plan`.

described.py   run configuration -> sizes of its model, from config.json files or by name     (no weight is read)
workload.py    run configuration -> token counts of a step, from shards or from assumptions
traced.py      what one layer keeps and needs, by running the model's own code on fake tensors
gathering.py   which parameters ZeRO-3 holds whole at each moment
memory.py      bytes of a step, part by part and moment by moment; its peak
hardware.py    figures of GPUs, as their vendors publish them
speed.py       arithmetic, communication and time of a step
plan.py        all of it for one run; show.py prints it
"""
