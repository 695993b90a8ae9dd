"""The course: lessons as notebooks, written anywhere with the data they read, and checks of exercises."""
