"""The search: Optuna proposes, Ray executes, the ledger records, MLflow shows.

The only package, with the command modules, that imports ray, optuna or mlflow.
"""
