"""Numbers about embeddings and accuracies: collapse, intervals, nearest neighbours and linear classifiers."""
