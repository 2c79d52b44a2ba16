"""Another virtual size, with every bitmap following; and bitmaps that were left behind made to fit."""
