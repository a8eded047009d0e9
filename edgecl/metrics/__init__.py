"""Numbers about embeddings and accuracies: collapse, intervals, nearest neighbors and linear classifiers."""
