"""An API that existing clients speak: limits, requests, the scheduler, and the HTTP server around them."""
