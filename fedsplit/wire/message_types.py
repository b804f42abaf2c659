"""Names of fedsplit's own Flower message types, apart so that reading them loads nothing."""

STEP_TYPE = "query.fedsplit_step"
WHO_TYPE = "query.fedsplit_who"
SERVE_TYPE = "query.fedsplit_serve"
SECURE_TYPE = "query.fedsplit_secure"
