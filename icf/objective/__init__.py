"""What only training needs: implicit text (MIT, Eq. 3-5), counterfactuals (SC, Eq. 6-12), contrast (CDCL, 13-17)."""
