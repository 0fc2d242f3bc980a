"""7. Many runs on a cluster: the script of an array job that saves itself before its time limit and requeues.

python examples/7_batch_job.py

It writes 7_batch_job.slurm and submits nothing. The same from the shell:

bamboo-md submit examples/7_batch_job.yaml --slurm --cpus 8
"""

import sys
from pathlib import Path

from md.batch import Job, slurm_script, submit_command
from md.sweep import load_sweep, members_of

SWEEP = Path(__file__).with_suffix(".yaml")

folder, script = Path("runs/7_batch_job"), Path("7_batch_job.slurm")
members = members_of(load_sweep(SWEEP), folder)
job = Job(time_s=24 * 3600.0, cpus=8, gpus=0, memory_GB=2.0)
command = ["sweep", str(SWEEP), "--folder", str(folder), "--member"]
programs = Path(sys.executable).parent
names = [member.name for member in members]
text = slurm_script(command, job, script=script, folder=folder, programs=programs, members=names)
script.write_text(text, encoding="utf-8")
for number, member in enumerate(members):
    print(f"{number:3d}  {member.name}")
print(f"wrote {script}; submit it with:  {submit_command(script, system='slurm')}")
