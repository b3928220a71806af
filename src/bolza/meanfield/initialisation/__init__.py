"""Critical initialisation: where the layers sit, what variance each is to have, how it is drawn, what data corrects."""
