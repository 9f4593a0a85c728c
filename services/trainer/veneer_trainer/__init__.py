"""The trainer service: training jobs, the registry of adapters, evaluations and exports."""
