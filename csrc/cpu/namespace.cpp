// The name of this level's namespace, in an object of its own for each level.
#define WEFT_TEXT(name) #name
#define WEFT_TEXT_OF(macro) WEFT_TEXT(macro)

namespace weft {

extern const char kNamespace[] = WEFT_TEXT_OF(WEFT_CPU);

}  // namespace weft
