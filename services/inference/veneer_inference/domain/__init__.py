"""What an answer is, who gives it and how it went; knows neither transport nor storage, nor an engine."""
