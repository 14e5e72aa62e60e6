"""The engine below the modules: optimizer steps, rollouts, minibatches, metrics, collectives, checkpoint state."""
