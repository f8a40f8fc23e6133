// Opened from disk, a page may not read other pages: the search then lists titles without their surroundings.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false

// A link may lead into what is folded: unfold it.
const unfold = () => {
  const place = document.getElementById(decodeURIComponent(location.hash.slice(1)))
  for (let fold = place?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true
  if (place) place.scrollIntoView()
}
addEventListener("hashchange", unfold)
addEventListener("DOMContentLoaded", unfold)
