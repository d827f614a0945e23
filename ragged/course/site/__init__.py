"""The course as static web pages. `python -m ragged.course.site`."""
