"""fastflower in other programs: trained models that predict, and betons as a torch Dataset."""
