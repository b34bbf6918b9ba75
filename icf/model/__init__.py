"""The paper's figure without what only training needs: encoders, attention, pixel decoder, queries, losses (Eq. 18)."""
