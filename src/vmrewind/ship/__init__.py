"""The second child process: carries captured records from the journal to the repository.

``python -m vmrewind.ship --vm NAME --journal DIR --repository URL --state DIR --runtime DIR`` is created idle at VM start and
imports next to nothing until ``<state>/ship.json`` names disks. What is shipped is known by the names of the repository's
objects alone, so it can be killed at any instant and goes on where it was.
"""
