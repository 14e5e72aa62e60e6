"""The format of the feedback store: items, judgements, snapshots, and the rows that training reads of them."""
