"""The optimizer: groups, checks, what a step does when something is wrong, reports, states."""
